"""What diffusion and flow papers share: each component is chosen by `class_path`, a paper replaces exactly one."""
