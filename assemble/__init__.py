"""The application: plans, runs, records and reports the stages of the papers.

commands      the command line, one file for each group of commands
stages        from a recipe to a record: configuration, plan, run, rehearse, verify
reporting     records, tables, claims and reports; doesn't import torch
"""
