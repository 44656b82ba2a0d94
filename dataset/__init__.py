"""Images, labels, labeled subsets and views. `build.build_data` puts them together for a run."""
