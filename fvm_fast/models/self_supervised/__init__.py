# SPDX-License-Identifier: Apache-2.0
"""Models trained on images without labels."""
