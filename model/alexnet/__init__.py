"""The example: torchvision's AlexNet as a KServe model, with weights and images of its own."""
