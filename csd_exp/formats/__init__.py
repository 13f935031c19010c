"""What files of pictures and videos say of themselves: colours, times, geometry, spheres, where they end."""
