"""How far results may lie from their references, in one place, each with the reason for its size."""

from __future__ import annotations

# One float32 operation on values up to 1 errs by 6e-8; the kernels chain a few dozen of them.
FLOAT32 = 2e-6

# Sums of hundreds of float32 terms (means and variances over a picture, pooled patches), relative to their size.
FLOAT32_SUM = 2e-5

# J of the same centroids, summed in float64 twice, in another order.
FLOAT64_SUM = 1e-12

# J after centroids were rounded to float32: 6e-8 on each of two unit vectors, in every direction.
ROUNDED_CENTROIDS = 2e-7

# Where `cluster` stops: a round that gains less than clustering.STILL is not taken, so that J at rest may lie some such
# rounds above the place it creeps towards.
AT_REST = 2e-6

# Two centroids that rest exactly at the margin hold each other there: no move of one alone lowers J, a move of both
# might.
AT_MARGIN = 2e-3

# A colour that went to codes and back, in codes of 8 bits: half a code of luma (255 / 219) and half a code of chroma
# (255 / 224) times the matrix's largest entry, 2 (1 - 0.0593) in BT.2020.
CODED_COLOUR = 0.5 * 255 / 219 + 0.5 * 255 / 224 * 1.8814

# swscale works in integers of 14 bits and rounds at the end, half a level; its chroma taps lie elsewhere, which on the
# smooth pictures of the test is under one level more.
SWSCALE_LEVELS = 1.5

# Pillow rounds to u8 between its two passes, half a level, times the second pass' weights, up to 1.3 in absolute sum
# for bicubic, and again at the end.
PILLOW_LEVELS = 1

# scikit-learn's best of ten random starts against one deterministic start, as a share of J, on vectors without any
# structure: over 40 draws 1.9 % on average (as one random start of scikit-learn), 7.1 % at worst. Where there are
# scenes to find, the two are equal.
SKLEARN_SHARE = 0.08

# A kernel's picture against its definition: sums in another order, which at a half may be rounded the other way.
KERNEL_LEVELS = 1

# swscale's pictures of natural clips, scaled, on average: its rounding above, chroma taps of its own, and filters whose
# coefficients have 14 bits. Found: 0.03 to 0.31, median 0.
SWSCALE_MEAN_LEVELS = 0.5

# Cosine between the built-in model's vectors of our pictures and of those that open_clip makes of the whole RGB frame.
# Found: 0.9998 and more for camera pictures, 0.9995 for test patterns; without a filter 0.998.
SAME_PICTURE_COSINE = 0.999

# The same for pictures that are enlarged. How chroma is interpolated shows then, and no standard says how: whole frames
# with bilinear and with bicubic chroma lie 0.998 apart themselves, and swscale lays chroma out by the ratio of the two
# planes, which for odd sizes is not quite 2. Found: 0.9875 at worst, 121 x 81 pixels of hard coloured edges.
ENLARGED_PICTURE_COSINE = 0.985

# Vectors of one runtime against those of another or torch's, both in float32: found 1 - 1e-7.
F32_COSINE = 0.99999

# Vectors of an image tower in bf16, 8 bits of mantissa, against float32: found 0.99996 and more.
BF16_COSINE = 0.999
