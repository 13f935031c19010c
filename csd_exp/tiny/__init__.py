"""Recipes, scores and pages of the embedded models; nothing imports it."""
