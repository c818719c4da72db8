"""A local web page that shows attention maps and predictions of networks for a dropped image."""
