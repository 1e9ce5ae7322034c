"""Inputs of any size cut into chunks, holding none of them. Read: port, lines, text, groups, parquet,
arrow_file, images, cutting, counting."""

from services.gateway.jobs.splitting.counting import about_rows
from services.gateway.jobs.splitting.cutting import Input, cuts
from services.gateway.jobs.splitting.port import Chunk, Cut, Cuts

__all__ = ["Chunk", "Cut", "Cuts", "Input", "about_rows", "cuts"]
