"""Stores: a teacher's outputs for fixed views of images, kept in files."""
