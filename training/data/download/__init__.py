"""What is fetched from the net: public model parts and the pictures of CC12M. Knows no format of training data."""
