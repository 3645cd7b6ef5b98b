"""Where each optimizer keeps its second moment, and how a start value is written there. Knows no Trainer and no maths of v0."""
