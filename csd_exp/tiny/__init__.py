"""The embedded small InstructPix2Pix: its photographs, its edits and the recipe that trains it."""
