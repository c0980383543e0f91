"""The paper's Section 4 as code: what fewer ReLUs can express, and what that costs a minority."""
