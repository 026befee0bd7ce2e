# SPDX-License-Identifier: Apache-2.0
"""Models trained on labelled images."""
