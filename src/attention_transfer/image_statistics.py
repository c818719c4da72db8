"""Mean and standard deviation of the channels of known data, in [0, 1] units."""

# From the paper's training code, where pixels are 0 to 255. It has none for CIFAR-100.
CIFAR10 = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
