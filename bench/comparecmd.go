package main

import "context"

func compareCommand(ctx context.Context, args []string) error { return nil }
