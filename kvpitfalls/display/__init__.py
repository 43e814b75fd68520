"""What a person sees: tables, plots, heat maps, pages, progress."""
