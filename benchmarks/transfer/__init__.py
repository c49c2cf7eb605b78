"""Ten thousand questions through the batch client: who waits for whom, and how much memory it takes."""
