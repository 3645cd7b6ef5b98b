"""Looks at what v0 does, outside of training: on two toy losses, and around and between saved checkpoints.

| module | question | command |
| --- | --- | --- |
| `saddle` | where does the first step of Adam send a point that starts next to the optimum? | `hf-v0init saddle` |
| `linear_loss` | how far is v0 from where the second moment settles, and what does that do to the step? | `hf-v0init linear-loss` |
| `loss_landscape` | how flat is the loss around a checkpoint? | `hf-v0init landscape` |
| `mode_connectivity` | is there a barrier between two checkpoints? | `hf-v0init connectivity` |

`checkpoint_loss` makes the loss of a saved checkpoint on a text file; `plots` draws. Importing this package imports none of them.
"""
