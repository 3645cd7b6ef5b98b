"""From a YAML file to the runs of a comparison. Starts nothing."""
