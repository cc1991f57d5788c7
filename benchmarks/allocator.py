"""Settings of glibc's allocator that every benchmark runs under."""

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Without these, glibc returns every large buffer to the system, and page faults dominate for all alike."""
