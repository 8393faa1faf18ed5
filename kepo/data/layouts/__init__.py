"""The layouts of datasets on disk, one file each."""
