"""Read data sets in the layouts in which they are distributed, and make batches.

These files make a sample, in this order:

    datasets/<name>.py              reads the layout of a data set; worlds/<name>.py generates a miniature
      -> listing.py                 Listing: files, labels and start and end times in a fixed order
      -> media.py                   reads a file; annotations.py, text.py: captions and their tokens
      -> transforms.py,             decoded frames, sound or image -> tensors for an encoder
         image_transforms.py
      -> item_dataset.py            ItemDataset: sample (epoch, item), equal in every worker and batch; clips.py and
                                    images.py extend it
      -> samplers.py                the order of items for each process; can resume at any step
      -> ../training/data_module.py ShardedDataModule: the loader, which makes batches
"""
