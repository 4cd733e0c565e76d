"""Video: methods that code frames by the frames before. May use what the other methods may."""
