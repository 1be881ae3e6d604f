"""The method, with neither MPI nor torch: who is perturbed, by what step, and what rewards become."""
