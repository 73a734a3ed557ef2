"""What runs on the device, a module for each kernel; importing any of them needs Triton."""

from ..installed import require

require()  # one message for whoever asks for a kernel, instead of what each import below would raise
