"""What a recipe will cost, on paper: from the model's shape and the data's lengths, before anything runs."""
