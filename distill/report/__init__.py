"""`mvmr report`: how faithful a student is to its teacher, as figures and as a page."""
