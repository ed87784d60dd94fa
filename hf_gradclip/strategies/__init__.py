"""One file, one strategy: the file's name is the word a spec uses. Nothing is registered; the folder is the list."""
