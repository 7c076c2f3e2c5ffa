"""What a folder of ours says of itself."""

#: beside DeepSpeed's own files, in a checkpoint's tag folder
MANIFEST = "ds_plugin.json"
