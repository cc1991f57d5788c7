"""Stand-ins on a CPU for what runs on GPUs alone, with the contracts and the quirks of the originals."""
