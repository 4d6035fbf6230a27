"""Encoders that come with the package: timm folders, each with its model card."""
