"""What a three-dimensional particle set is made of: cameras, photographs, fields and what is made of them."""
