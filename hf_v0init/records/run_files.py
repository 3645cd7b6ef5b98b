"""Names of the files that a finished run leaves in its output folder, as transformers' Trainer writes them."""

STATE_FILE = "trainer_state.json"
RESULTS_FILE = "all_results.json"
