# SPDX-License-Identifier: Apache-2.0
"""Models trained to tell matching pairs from the rest of the batch."""
