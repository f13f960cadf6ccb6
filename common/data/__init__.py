"""Data sets in the layouts in which they are distributed, and batches of them.

How a sample is made, file by file:

    datasets/<name>.py              reads the layout of a data set; worlds/<name>.py generates a miniature
      -> listing.py                 Listing: files, labels and cuts in a fixed order, as columns
      -> media.py                   reads a file; annotations.py, text.py: captions and their tokens
      -> transforms.py,             decoded frames, sound or image -> tensors for an encoder
         image_transforms.py
      -> item_dataset.py            ItemDataset: a sample by (epoch, item), the same in any worker and batch; clips.py,
                                    images.py
      -> samplers.py                which items, in what order, for each process; resumes at any step
      -> ../training/data_module.py ShardedDataModule: the loader, which makes batches
"""
