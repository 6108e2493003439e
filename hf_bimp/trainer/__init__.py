"""Everything that ties a run to `transformers.Trainer`."""
