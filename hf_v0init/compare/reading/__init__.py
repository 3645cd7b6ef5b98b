"""From folders of runs to numbers."""
