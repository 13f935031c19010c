"""What scores a view: a frozen diffusion model, or a Gaussian mixture in closed form."""
