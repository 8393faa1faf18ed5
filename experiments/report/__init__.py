"""What the results say, in tables and a picture, which `experiments.page` puts together."""
