"""What happened, made visible: tiles, slots, the loss mask, loss curves, and the report. Imports no torch.

from opsin.inspect.overlay import draw_slots, draw_tiles     a picture as the tower and the language model see it
from opsin.inspect.tokens import mask_html, mask_pieces, mask_text     which tokens of a conversation are taught
from opsin.inspect.curves import loss_svg, read_curves     the loss of each training stage
from opsin.inspect.report import Report, write_report     all of it on one page
"""
