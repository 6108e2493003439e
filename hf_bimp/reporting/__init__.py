"""What a run tells: results, pictures, model card, and the measures in them."""
