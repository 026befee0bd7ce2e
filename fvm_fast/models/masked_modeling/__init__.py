# SPDX-License-Identifier: Apache-2.0
"""Models that learn by predicting the patches of an image that are masked out."""
