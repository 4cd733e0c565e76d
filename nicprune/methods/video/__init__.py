"""Coding of video: codecs of images, frame by frame. May use what methods may use."""
