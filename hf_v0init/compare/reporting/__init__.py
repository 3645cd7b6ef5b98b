"""From numbers to words, tables and plots."""
