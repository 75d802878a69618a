"""What looks at a trained model: predictions, scores, pictures and the report."""
