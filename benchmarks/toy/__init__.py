"""The toy problem of the CAGrad and Nash-MTL papers, and two-task forms of the methods."""
