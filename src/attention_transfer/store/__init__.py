"""Stores: what a teacher says of fixed views of images, kept in files."""
