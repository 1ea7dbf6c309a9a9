"""The subcommands of `dino`, one file each; the scripts in train/ and eval/ call the same code."""
