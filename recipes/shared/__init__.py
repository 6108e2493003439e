"""What several recipes share: arguments, data, models, and the end of a run."""
