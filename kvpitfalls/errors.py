"""The exceptions that are this package's own; wrong arguments raise ValueError and TypeError as usual."""


class DeviceError(RuntimeError):
    """Tensors are on different devices, or on one that no backend serves."""


class CudaError(RuntimeError):
    """The CUDA runtime refused a call; the message holds its own words."""


class UnsupportedModelError(NotImplementedError):
    """The model holds or uses its key/value cache in a way that cannot be compressed correctly."""


class NotInterceptedError(RuntimeError):
    """A layer ran its attention past the compression, so that it would have stayed uncompressed in silence."""
