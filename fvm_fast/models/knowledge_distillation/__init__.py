# SPDX-License-Identifier: Apache-2.0
"""Models trained with the help of a teacher."""
