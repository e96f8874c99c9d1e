"""The command `noisebench`: thin verbs over the rooms of the project."""
